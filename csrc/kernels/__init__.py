"""The CUDA sources that NVRTC compiles at run time, installed as package data.

This file makes the folder a package, which editable installs need to find it.
"""
