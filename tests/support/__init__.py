"""Harnesses of the tests: no file here holds a test."""
