// The instructions of device/wgmma.cuh, for each number of columns: of `float (&d)[kEights][4]`,
// one of 4, 8, 12 or 16 eights.
//
// The operands of an asm statement are numbered from its sums on, so each has its own numbers.
#pragma once

#define BERTFAST_SUMS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define BERTFAST_SUMS_64 \
  BERTFAST_SUMS_32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BERTFAST_SUMS_96 \
  BERTFAST_SUMS_64       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BERTFAST_SUMS_128 \
  BERTFAST_SUMS_96        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define BERTFAST_EIGHT(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define BERTFAST_EIGHTS_4 BERTFAST_EIGHT(0), BERTFAST_EIGHT(1), BERTFAST_EIGHT(2), BERTFAST_EIGHT(3)
#define BERTFAST_EIGHTS_8 \
  BERTFAST_EIGHTS_4, BERTFAST_EIGHT(4), BERTFAST_EIGHT(5), BERTFAST_EIGHT(6), BERTFAST_EIGHT(7)
#define BERTFAST_EIGHTS_12 \
  BERTFAST_EIGHTS_8, BERTFAST_EIGHT(8), BERTFAST_EIGHT(9), BERTFAST_EIGHT(10), BERTFAST_EIGHT(11)
#define BERTFAST_EIGHTS_16 \
  BERTFAST_EIGHTS_12, BERTFAST_EIGHT(12), BERTFAST_EIGHT(13), BERTFAST_EIGHT(14), BERTFAST_EIGHT(15)

// p: the operand that says whether to add to the sums.
#define BERTFAST_WGMMA(columns, type, a, b, p, majors)                  \
  "{\n"                                                                 \
  ".reg .pred adds;\n"                                                  \
  "setp.ne.b32 adds, " p                                                \
  ", 0;\n"                                                              \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type \
  " "                                                                   \
  "{" BERTFAST_SUMS_##columns "}, " a ", " b ", adds, 1, 1, " majors    \
                              ";\n"                                     \
                              "}"

// d = a b, or d += a b, with A in four registers.
#define BERTFAST_WGMMA_REGISTERS(type)                                                       \
  if constexpr (kEights == 4) {                                                              \
    asm volatile(BERTFAST_WGMMA(32, type, "{%16, %17, %18, %19}", "%20", "%21", "%22")       \
                 : BERTFAST_EIGHTS_4                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
                   "n"(int(kB)));                                                            \
  } else if constexpr (kEights == 8) {                                                       \
    asm volatile(BERTFAST_WGMMA(64, type, "{%32, %33, %34, %35}", "%36", "%37", "%38")       \
                 : BERTFAST_EIGHTS_8                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
                   "n"(int(kB)));                                                            \
  } else if constexpr (kEights == 12) {                                                      \
    asm volatile(BERTFAST_WGMMA(96, type, "{%48, %49, %50, %51}", "%52", "%53", "%54")       \
                 : BERTFAST_EIGHTS_12                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
                   "n"(int(kB)));                                                            \
  } else if constexpr (kEights == 16) {                                                      \
    asm volatile(BERTFAST_WGMMA(128, type, "{%64, %65, %66, %67}", "%68", "%69", "%70")      \
                 : BERTFAST_EIGHTS_16                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
                   "n"(int(kB)));                                                            \
  } else {                                                                                   \
    static_assert(kEights == 4, "32, 64, 96 or 128 columns");                                \
  }

// The same with A in shared memory.
#define BERTFAST_WGMMA_SHARED(type)                                                   \
  if constexpr (kEights == 4) {                                                       \
    asm volatile(BERTFAST_WGMMA(32, type, "%16", "%17", "%18", "%19, %20")            \
                 : BERTFAST_EIGHTS_4                                                  \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB))); \
  } else if constexpr (kEights == 8) {                                                \
    asm volatile(BERTFAST_WGMMA(64, type, "%32", "%33", "%34", "%35, %36")            \
                 : BERTFAST_EIGHTS_8                                                  \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB))); \
  } else if constexpr (kEights == 12) {                                               \
    asm volatile(BERTFAST_WGMMA(96, type, "%48", "%49", "%50", "%51, %52")            \
                 : BERTFAST_EIGHTS_12                                                 \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB))); \
  } else if constexpr (kEights == 16) {                                               \
    asm volatile(BERTFAST_WGMMA(128, type, "%64", "%65", "%66", "%67, %68")           \
                 : BERTFAST_EIGHTS_16                                                 \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB))); \
  } else {                                                                            \
    static_assert(kEights == 4, "32, 64, 96 or 128 columns");                         \
  }
