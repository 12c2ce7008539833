"""int8: a Hadamard rotation, calibration, GPTQ, and the passes that write quantised operators."""
