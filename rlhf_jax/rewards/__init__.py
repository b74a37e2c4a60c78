"""What scores a completion from its text: verifiable instructions, answers to sums, and judges. Host code."""
