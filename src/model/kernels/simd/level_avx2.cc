#define MESHLOOM_SIMD_LEVEL level_avx2
#define MESHLOOM_SIMD_BYTES 32
#include "model/kernels/simd/table.h"
