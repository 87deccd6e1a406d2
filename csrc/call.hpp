// What a call works on, and what it needs besides: rows [images * height * width, channels] of maps.
#pragma once

#include <cstdint>
#include <vector>

#include "half.hpp"
#include "vectors.hpp"
#include "winograd.hpp"

#ifdef USF_PRODUCTS

namespace usf {

// The maps that the rows make up.
struct Maps {
    std::int64_t images, height, width;

    std::int64_t positions() const { return height * width; }
    std::int64_t rows() const { return images * positions(); }
};

// What a conditioned layer adds: rows [images, positions, width], one image's for all if `images` is 1. They
// are `rounded` if that is not null.
struct Condition {
    const float* data;
    std::int64_t images;
    int width;
    const BFloat16* rounded = nullptr;

    // That of images whose first row is this one.
    Condition from(std::int64_t row) const {
        if (images == 1) return *this;
        return {data ? data + row * width : nullptr, images, width,
                rounded ? rounded + row * width : nullptr};
    }
};

// What a call works on. `state` and `log_det` are those of a StageRun.
struct Call {
    Maps maps;
    int threads;
    const Condition* conditions = nullptr;
    float *state = nullptr, *log_det = nullptr;
};
// Of a thread, kept from call to call: fresh memory costs more than what is done with it.
struct Scratch {
    Floats outputs[2];
    Floats zeros, rounded, state, shares;
    std::vector<float> affine, log_det;
    std::vector<const float*> pointers, condition;
    std::vector<float*> rows;
    std::vector<WinogradTile> tiles;
    Floats points[2];
};
inline Scratch& scratch_of_thread() {
    static thread_local Scratch scratch;
    return scratch;
}
// Some rows, and where they lie among all.
struct Stretch {
    const Call& call;
    std::int64_t first;
    int rows;
    Scratch& scratch;
    float* state = nullptr;  // its own; null where it is a part of the call's
};

}  // namespace usf
#endif
