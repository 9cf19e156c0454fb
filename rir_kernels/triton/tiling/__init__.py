"""Which tile a kernel gets, and what it is expected to cost."""
