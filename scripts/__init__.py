"""Commands of the repository, and what they share; a package so that they can import from each
other's folders.
"""
