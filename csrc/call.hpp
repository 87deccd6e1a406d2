// Arguments and scratch memory of a call on rows [images * height * width, channels] of maps.
#pragma once

#include <cstdint>
#include <vector>

#include "half.hpp"
#include "vectors.hpp"
#include "winograd.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// Sizes of the maps that the rows belong to.
struct Maps {
    std::int64_t images, height, width;

    std::int64_t positions() const { return height * width; }
    std::int64_t rows() const { return images * positions(); }
};

// Rows [images, positions, width] that a conditioned layer adds to its outputs; the same for all images if
// `images` is 1. They are in `rounded` if that is not null.
struct Condition {
    const float* data;
    std::int64_t images;
    int width;
    const BFloat16* rounded = nullptr;

    // The condition of the images that start at this row.
    Condition from(std::int64_t row) const {
        if (images == 1) return *this;
        return {data ? data + row * width : nullptr, images, width,
                rounded ? rounded + row * width : nullptr};
    }
};

// Arguments of a call. `state` and `log_det` are used by a StageRun only.
struct Call {
    Maps maps;
    int threads;
    const Condition* conditions = nullptr;
    float *state = nullptr, *log_det = nullptr;
};
// Scratch memory of a thread, kept from call to call: fresh memory costs more than the work done in it.
struct Scratch {
    Floats outputs[2];
    Floats zeros, rounded, state, shares, values;
    std::vector<float> log_det;
    std::vector<const float*> pointers, condition;
    std::vector<float*> rows;
    std::vector<WinogradTile<2>> tiles;
    std::vector<WinogradTile<4>> large_tiles;
    Floats points[2];

    template <int side>
    std::vector<WinogradTile<side>>& tiles_of() {
        if constexpr (side == 2)
            return tiles;
        else
            return large_tiles;
    }
};
inline Scratch& scratch_of_thread() {
    static thread_local Scratch scratch;
    return scratch;
}
// Neighbouring rows of a call, from row `first` on.
struct Stretch {
    const Call& call;
    std::int64_t first;
    int rows;
    Scratch& scratch;
    float* state = nullptr;  // the stretch's own state; null if it uses a part of the call's
};

}  // namespace usf
#endif
