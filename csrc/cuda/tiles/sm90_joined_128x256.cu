#include "../sm90.cuh"

FR_SM90_JOINED_TILE(128, 256, 2, Cooperative)
