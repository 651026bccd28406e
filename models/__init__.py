"""Networks: the decomposition of stage 1, its fusion, and the guided FLUX of stages 2 and 3."""
