"""Polynomials of the exact GELU, lowest power first. Written by fit.py, which says what
they are; a test runs it again."""

LIMIT = 16.0  # of their argument

# Degree 6; largest error 0.055 float16 ulp.
FORWARD_16 = (
    -1.0000398,
    -1.15047,
    -0.4607787,
    -0.05142395,
    0.007203249,
    -0.0005942269,
    2.039573e-05,
)

# Degree 8; largest error 1.6 u of max(result, 0.1).
FORWARD_32 = (
    -1.0,
    -1.1511086,
    -0.45917514,
    -0.05260185,
    0.007220022,
    -0.000258289,
    -0.00013565739,
    2.872136e-05,
    -1.9449765e-06,
)

# Degree 8; largest error 0.046 float16 ulp of max(result, 0.001).
BACKWARD_16 = (
    0.4999893,
    -0.7974707,
    0.24725196,
    -0.12513919,
    0.050286543,
    -0.014924773,
    0.0029691178,
    -0.00034536008,
    1.7513656e-05,
)

# Degree 12; largest error 1.6 u of max(result, 0.2).
BACKWARD_32 = (
    0.5,
    -0.797884,
    0.2499895,
    -0.13290736,
    0.062235653,
    -0.02602626,
    0.009616821,
    -0.0030273695,
    0.00076766615,
    -0.00014642839,
    1.9303223e-05,
    -1.5449931e-06,
    5.6012983e-08,
)
