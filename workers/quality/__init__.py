"""What a smaller form of a model costs in quality: its answers' probabilities beside those of the whole model.

Knows nothing about queues or processes.
"""
