#include "../sm80.cuh"

FR_SM80_TILE(128, 128, 64, 64, 3)
