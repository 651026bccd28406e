"""Objectives: functions of tensors, computed in fp32; unequal shapes raise an error."""
