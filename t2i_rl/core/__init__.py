"""What everything else stands on: files, images, ranks, numbers, texts.

It imports nothing else of t2i_rl.
"""
