"""How a case is measured: what the device can do, how long a call takes, whether its result is right."""
