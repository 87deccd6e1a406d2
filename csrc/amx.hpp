// The tile registers of processors with AMX: eight registers of 16 rows of 64 bytes, and an instruction that
// multiplies two tiles of bfloat16 numbers and adds the product to a third one's floats (Intel Architecture
// Instruction Set Extensions Programming Reference, "Intel AMX instruction set reference").
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "vectors.hpp"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define USF_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace usf {

// Whether this processor has AMX with bfloat16.
inline bool processor_has_amx() {
#ifdef USF_AMX
    constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & bfloat16) && (edx & tiles);
#else
    return false;
#endif
}

inline bool may_use_amx = true;  // tests clear it, to run the code of other processors

// Whether the processor has AMX and the system lets this process use it. The system is asked at the first
// call, not when the extension is loaded: once granted, signal handlers need larger stacks.
inline bool has_amx() {
#ifdef USF_AMX
    static const bool granted = [] {
        constexpr long ask_for = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        return processor_has_amx() && syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
    }();
    return may_use_amx && granted && best_lanes() == 16;
#else
    return false;
#endif
}

// Rows of a tile, and words per row.
constexpr int tile_rows = 16, tile_words = 16;

#ifdef USF_AMX

// During its lifetime, the thread's eight tiles have their full size. Registers 0 to 3 are for sums, 4 and 5
// for the rows they belong to, 6 and 7 for weights.
class TileShapes {
public:
    TileShapes() {
        struct {
            std::uint8_t palette = 1, start = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        std::fill_n(shapes.bytes, 8, std::uint16_t{4 * tile_words});
        std::fill_n(shapes.rows, 8, std::uint8_t{tile_rows});
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~TileShapes() { asm volatile("tilerelease" ::: "memory"); }
    TileShapes(const TileShapes&) = delete;
};

template <int tile>
USF_INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Load and store a tile whose rows are `stride` words apart in memory.
template <int tile>
USF_INLINE void load_tile(const float* from, std::ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(tile) : "memory");
}
template <int tile>
USF_INLINE void store_tile(float* to, std::ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(4 * stride), "i"(tile) : "memory");
}
template <int sums, int rows, int weights>
USF_INLINE void add_product_of_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(weights));
}

#endif

}  // namespace usf
