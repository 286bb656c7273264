/* The kernels for processors with AVX2 and FMA. */
#include "common.h"

#ifdef __x86_64__
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_avx2
#define INSTRUCTION_SET "avx2"
#include "simd_avx2.h"

#include "layer.h"
#endif
