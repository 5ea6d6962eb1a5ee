"""Commands that compare with a truth, and that look for errors without one."""
