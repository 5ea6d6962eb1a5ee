"""What a run will take: time, money, disk and files, from one timed block and measured rates."""
