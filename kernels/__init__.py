"""The Triton kernels of fusedlr: measure, decide, apply, and the small functions they are given.

This package imports torch and triton, never fusedlr. Its functions are the twins of the references in fusedlr: same
names, argument names and argument order.
"""
