"""The material of an experiment: the controlled world (`simulated`), or text from files (`text`)."""
