#include "../sm90.cuh"

FR_SM90_JOINED_TILE(128, 128, 1, Pingpong)
