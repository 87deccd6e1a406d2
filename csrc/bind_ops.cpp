#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <tuple>
#include <vector>

#include "anomaly_map.hpp"
#include "bindings.hpp"
#include "coupling_gradients.hpp"
#include "inverse.hpp"
#include "norms.hpp"
#include "sums.hpp"
#include "talking_heads.hpp"
#include "triangle.hpp"

namespace usf {

// Tensors are passed as (address, strides): float32, on the CPU, with the sizes that the operation expects,
// as usf_kernels/ops/native.py ensures. Making an array of each would take as long as a small operation.
using Sizes = std::vector<std::int64_t>;
using Tensor = std::pair<std::uintptr_t, Sizes>;

template <class T>
std::optional<Features<T>> view(const Tensor& tensor, Sizes sizes, std::int64_t channels) {
    if (sizes.size() != tensor.second.size()) throw nb::value_error("as many strides as sizes");
    sizes[1] = channels;
    return flatten(reinterpret_cast<T*>(tensor.first), sizes, tensor.second);
}

using Address = std::optional<std::uintptr_t>;

template <class T>
T* pointer(const Address& address) {
    return reinterpret_cast<T*>(address.value_or(0));
}

std::optional<Exit> exit_of(const Address& index, std::int64_t channels, const Address& scale,
                            const Address& bias) {
    Exit exit{{}, pointer<const float>(scale), pointer<const float>(bias)};
    if (!index) return exit;
    auto inverse = inverse_of(pointer<const std::int64_t>(index), channels);
    if (!inverse) return std::nullopt;
    exit.to = std::move(*inverse);
    return exit;
}

void bind_ops(nb::module_& m) {
    using namespace nb::literals;
    m.def(
        "use_huge_pages",
        [](std::uintptr_t memory, std::size_t bytes) {
            nb::gil_scoped_release unlocked;
            use_huge_pages(reinterpret_cast<void*>(memory), bytes);
        },
        "memory"_a, "bytes"_a);
    m.def(
        "copy_triangle",
        [](std::uintptr_t matrix, std::int64_t stride, const std::pair<std::int64_t, std::int64_t>& sizes,
           bool upper, std::uintptr_t diagonal, std::uintptr_t out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [rows, columns] = sizes;
            copy_triangle(reinterpret_cast<const float*>(matrix), stride, rows, columns, upper,
                          reinterpret_cast<const float*>(diagonal), reinterpret_cast<float*>(out), threads);
        },
        "matrix"_a, "stride"_a, "sizes"_a, "upper"_a, "diagonal"_a, "out"_a, "threads"_a);
    m.def(
        "pixel_products",
        [](std::uintptr_t rows, const std::array<std::int64_t, 4>& sizes, std::uintptr_t out, int threads) {
            nb::gil_scoped_release unlocked;
            const auto [batch, height, width, channels] = sizes;
            pixel_products(reinterpret_cast<const float*>(rows), batch, height, width, channels,
                           reinterpret_cast<float*>(out), threads);
        },
        "rows"_a, "sizes"_a, "out"_a, "threads"_a);
    m.def(
        "anomaly_map",
        [](const std::vector<std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>>& scales,
           bool latent, const std::array<std::int64_t, 3>& sizes, std::uintptr_t out, int threads) {
            nb::gil_scoped_release unlocked;
            std::vector<Scale> maps;
            for (const auto& [address, channels, height, width] : scales)
                maps.push_back({reinterpret_cast<float*>(address), channels, height, width});
            const auto [batch, height, width] = sizes;
            anomaly_map(maps, latent, batch, height, width, reinterpret_cast<float*>(out), threads);
        },
        "scales"_a, "latent"_a, "sizes"_a, "out"_a, "threads"_a);
#ifdef USF_PRODUCTS
    m.def(
        "invert",
        [](std::uintptr_t matrix, std::int64_t n, std::uintptr_t out, int threads) {
            nb::gil_scoped_release unlocked;
            return invert(reinterpret_cast<const float*>(matrix), n, reinterpret_cast<float*>(out), threads);
        },
        "matrix"_a, "n"_a, "out"_a, "threads"_a);
    m.def(
        "talking_heads",
        [](std::int64_t images, const std::array<int, 3>& sizes, std::uintptr_t qkv, bool bfloat16,
           std::uintptr_t before, std::uintptr_t after, std::uintptr_t bias, std::uintptr_t out,
           int threads) {
            nb::gil_scoped_release unlocked;
            const auto floats = [](std::uintptr_t at) { return reinterpret_cast<const float*>(at); };
            const auto [tokens, heads, width] = sizes;
            const TalkingHeads by{tokens, heads, width, floats(before), floats(after), floats(bias)};
            if (bfloat16)
                talking_heads(by, reinterpret_cast<const BFloat16*>(qkv), images,
                              reinterpret_cast<BFloat16*>(out), threads);
            else
                talking_heads(by, floats(qkv), images, reinterpret_cast<float*>(out), threads);
        },
        "images"_a, "sizes"_a, "qkv"_a, "bfloat16"_a, "before"_a, "after"_a, "bias"_a, "out"_a, "threads"_a);
#endif
    // All functions below return false, without writing anything, if there is no loop here for the strides.
    m.def(
        "squared_norm",
        [](const Sizes& sizes, const Tensor& z, std::uintptr_t out, int threads) {
            const auto from = view<const float>(z, sizes, sizes[1]);
            nb::gil_scoped_release unlocked;
            return from && squared_norm(*from, extent_of(sizes), reinterpret_cast<float*>(out), threads);
        },
        "sizes"_a, "z"_a, "out"_a, "threads"_a);
    m.def(
        "channel_sums",
        [](const Sizes& sizes, const Tensor& z, std::uintptr_t out, int threads) {
            const auto from = view<const float>(z, sizes, sizes[1]);
            nb::gil_scoped_release unlocked;
            return from && channel_sums(*from, extent_of(sizes), reinterpret_cast<float*>(out), threads);
        },
        "sizes"_a, "z"_a, "out"_a, "threads"_a);
    m.def(
        "squared_norm_gradient",
        [](const Sizes& sizes, std::uintptr_t grad, const Tensor& z, const Tensor& out, int threads) {
            const auto from = view<const float>(z, sizes, sizes[1]);
            const auto to = view<float>(out, sizes, sizes[1]);
            nb::gil_scoped_release unlocked;
            return from && to &&
                   squared_norm_gradient(reinterpret_cast<const float*>(grad), *from, extent_of(sizes), *to,
                                         threads);
        },
        "sizes"_a, "grad"_a, "z"_a, "out"_a, "threads"_a);
    m.def(
        "couple",
        [](const Sizes& sizes, const Tensor& x, const Tensor& params, std::int64_t split,
           std::optional<float> clamp, bool inverse, Address index, Address scale, Address bias,
           const Tensor& out, Address log_det, int threads) {
            const Coupling coupling{clamp.value_or(Coupling::none), inverse};
            const std::int64_t outputs = (clamp ? 2 : 1) * (sizes[1] - split);
            const auto from = view<const float>(x, sizes, sizes[1]);
            const auto with = view<const float>(params, sizes, outputs);
            const auto to = view<float>(out, sizes, sizes[1]);
            const auto exit = exit_of(index, sizes[1], scale, bias);
            nb::gil_scoped_release unlocked;
            return from && with && to && exit &&
                   couple(coupling, split, *exit, *from, *with, extent_of(sizes), *to,
                          pointer<float>(log_det), threads);
        },
        "sizes"_a, "x"_a, "params"_a, "split"_a, "clamp"_a.none(), "inverse"_a, "index"_a.none(),
        "scale"_a.none(), "bias"_a.none(), "out"_a, "log_det"_a.none(), "threads"_a);
    m.def(
        "couple_gradient",
        [](const Sizes& sizes, const Tensor& grad, Address grad_log_det, const Tensor& x,
           const Tensor& params, std::int64_t split, std::optional<float> clamp, bool inverse, Address index,
           Address scale, const Tensor& grad_x, const Tensor& grad_params, Address grad_scale,
           Address grad_bias, int threads) {
            const Coupling coupling{clamp.value_or(Coupling::none), inverse};
            const std::int64_t outputs = (clamp ? 2 : 1) * (sizes[1] - split);
            const auto grad_y = view<const float>(grad, sizes, sizes[1]);
            const auto from = view<const float>(x, sizes, sizes[1]);
            const auto with = view<const float>(params, sizes, outputs);
            const auto to = view<float>(grad_x, sizes, sizes[1]);
            const auto to_params = view<float>(grad_params, sizes, outputs);
            const auto exit = exit_of(index, sizes[1], scale, std::nullopt);
            nb::gil_scoped_release unlocked;
            return grad_y && from && with && to && to_params && exit &&
                   couple_gradient(coupling, split, *exit, *grad_y, pointer<const float>(grad_log_det), *from,
                                   *with, extent_of(sizes), *to, *to_params, pointer<float>(grad_scale),
                                   pointer<float>(grad_bias), threads);
        },
        "sizes"_a, "grad"_a, "grad_log_det"_a.none(), "x"_a, "params"_a, "split"_a, "clamp"_a.none(),
        "inverse"_a, "index"_a.none(), "scale"_a.none(), "grad_x"_a, "grad_params"_a, "grad_scale"_a.none(),
        "grad_bias"_a.none(), "threads"_a);
    m.def(
        "uncouple",
        [](const Sizes& sizes, const Tensor& y, const Tensor& grad, Address grad_log_det,
           const Tensor& params, std::int64_t split, std::optional<float> clamp, Address index, Address scale,
           Address bias, const Tensor& x, const Tensor& grad_x, const Tensor& grad_params, Address grad_scale,
           Address grad_bias, int threads) {
            const Coupling coupling{clamp.value_or(Coupling::none), false};
            const std::int64_t outputs = (clamp ? 2 : 1) * (sizes[1] - split);
            const auto from = view<const float>(y, sizes, sizes[1]);
            const auto grad_y = view<const float>(grad, sizes, sizes[1]);
            const auto with = view<const float>(params, sizes, outputs);
            const auto to = view<float>(x, sizes, sizes[1]), to_grad = view<float>(grad_x, sizes, sizes[1]);
            const auto to_params = view<float>(grad_params, sizes, outputs);
            const auto exit = exit_of(index, sizes[1], scale, bias);
            nb::gil_scoped_release unlocked;
            return from && grad_y && with && to && to_grad && to_params && exit &&
                   uncouple(coupling, split, *exit, *from, *grad_y, *with, pointer<const float>(grad_log_det),
                            extent_of(sizes), *to, *to_grad, *to_params, pointer<float>(grad_scale),
                            pointer<float>(grad_bias), threads);
        },
        "sizes"_a, "y"_a, "grad"_a, "grad_log_det"_a.none(), "params"_a, "split"_a, "clamp"_a.none(),
        "index"_a.none(), "scale"_a.none(), "bias"_a.none(), "x"_a, "grad_x"_a, "grad_params"_a,
        "grad_scale"_a.none(), "grad_bias"_a.none(), "threads"_a);
}

}  // namespace usf
