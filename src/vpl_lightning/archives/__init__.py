"""The official archives and what is made of them: lists, masks, labels, and the check of every file.

Nothing here imports torch, since the work is done in helper processes.
"""
