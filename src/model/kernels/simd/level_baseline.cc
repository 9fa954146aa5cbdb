#define MESHLOOM_SIMD_LEVEL level_baseline
#define MESHLOOM_SIMD_BYTES 16
#include "model/kernels/simd/table.h"
