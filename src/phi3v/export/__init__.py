"""``phi3v export`` and ``phi3v merge``: a trained model as a folder that loads wherever the original does.

What is written is loaded again and compared with the trained model on real samples before it is called done.
"""
