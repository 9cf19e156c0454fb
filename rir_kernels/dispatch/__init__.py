"""Dispatch of a call: check it, look up its plan, choose an implementation."""
