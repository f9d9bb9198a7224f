#include "../sm90.cuh"

FR_SM90_TILE(64, 128, 1, Pingpong)
