"""What everything else stands on: files, images, ranks, numbers. It imports nothing of t2i_rl but `errors`."""
