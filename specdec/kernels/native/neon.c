/* The kernels for 64-bit ARM processors. */
#include "common.h"

#ifdef __aarch64__
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>

#define KERNELS kernels_neon
#define INSTRUCTION_SET "neon"
#include "simd_neon.h"

#include "layer.h"
#endif
