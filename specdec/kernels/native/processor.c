/* Which kernels the processor can run. */
#define _GNU_SOURCE
#include "common.h"

static int is_wanted(const char *name, const char *instruction_set) { return !name || !strcmp(name, instruction_set); }

#ifdef __x86_64__
#include <cpuid.h>
#ifdef HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the processor has int8 tiles and the system lets this process use them (Linux keeps them back until asked). */
static int can_use_amx(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, TILES = 1 << 24, INT8_TILES = 1 << 25 };
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & INT8_TILES) &&
           !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}
#endif

const Kernels *best_kernels(const char *name) {
    __builtin_cpu_init();
    unsigned a = 0, b, c, d;
    const int has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    const int has_avx2 = has_f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int has_avx512 = has_avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512vl");
    const Kernels *best = NULL;
    if (has_avx2 && is_wanted(name, "avx2")) best = &kernels_avx2;
#ifdef HAS_AVX_VNNI
    const int has_avx_vnni = has_avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
    if (has_avx_vnni && is_wanted(name, "avxvnni")) best = &kernels_avxvnni;
#endif
    if (has_avx512 && is_wanted(name, "avx512")) best = &kernels_avx512;
#ifdef HAS_AMX
    if (has_avx512 && is_wanted(name, "amx") && can_use_amx()) best = &kernels_amx;
#endif
    return best;
}

#elif defined(__aarch64__)
#ifdef __linux__
#include <sys/auxv.h>
#define HAS(name, capabilities, bit) (getauxval(capabilities) >> (bit)&1)
#elif defined(__APPLE__)
#include <sys/sysctl.h>
static int has(const char *feature) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(feature, &value, &size, NULL, 0) && value;
}
#define HAS(name, capabilities, bit) has("hw.optional.arm.FEAT_" name)
#else
#define HAS(name, capabilities, bit) 0 /* such a system is not known here */
#endif

const Kernels *best_kernels(const char *name) {
    const Kernels *best = is_wanted(name, "neon") ? &kernels_neon : NULL;
#ifdef HAS_DOTPROD
    if (HAS("DotProd", AT_HWCAP, 20) && is_wanted(name, "dotprod")) best = &kernels_dotprod;
#endif
#ifdef HAS_I8MM
    if (HAS("I8MM", AT_HWCAP2, 13) && is_wanted(name, "i8mm")) best = &kernels_i8mm;
#endif
    return best;
}
#else
const Kernels *best_kernels(const char *name) { return is_wanted(name, "") ? NULL : NULL; }
#endif
