#define MESHLOOM_SIMD_LEVEL level_avx512
#define MESHLOOM_SIMD_BYTES 64
#include "model/kernels/simd/table.h"
