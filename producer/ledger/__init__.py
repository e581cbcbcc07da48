"""The request's state machine: thin Python over Lua scripts. The only code that changes a request's state."""
