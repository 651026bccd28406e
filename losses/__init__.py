"""Objectives: functions of tensors, computed in fp32, that refuse unequal shapes."""
