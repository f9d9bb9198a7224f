#include "../sm90.cuh"

FR_SM90_TILE(128, 64, 1, Pingpong)
