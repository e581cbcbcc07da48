"""The model card's own usage behind this project's engine messages: the yardstick that the native engine is held against.

It runs the Python files of the checkpoint's folder, on transformers 4.30.2, and only when asked to.
"""
