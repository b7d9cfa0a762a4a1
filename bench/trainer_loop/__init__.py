"""The cost of the training loop besides the step itself: ``Trainer`` and a bare loop are timed in turns.

``python -m bench.trainer_loop`` uses MNIST's shapes, 784-256-10 in batches of 256, with random images. The aim is a
ratio of at most 1.03.
"""
