#include "../sm90.cuh"

FR_SM90_JOINED_TILE(64, 64, 1, Pingpong)
