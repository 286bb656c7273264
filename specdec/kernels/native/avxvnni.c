/* The kernels for processors with AVX2 and AVX-VNNI, without AVX-512. */
#include "common.h"

#ifdef HAS_AVX_VNNI
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_avxvnni
#define INSTRUCTION_SET "avxvnni"
#define AVX_VNNI
#define ALSO ",avxvnni"
#include "simd_avx2.h"

#include "layer.h"
#endif
