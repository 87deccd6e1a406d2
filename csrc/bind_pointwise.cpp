#include "bindings.hpp"
#include "pointwise_run.hpp"

#ifdef USF_PRODUCTS
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>
#endif

namespace usf {

#ifdef USF_PRODUCTS

// Shapes are those of the fused modules, which make them.
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bias = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Channels = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using State = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using LogDet = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Shares = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Layers = std::vector<PointwiseLayer>;

Half channels_of(const Channels& index, const PointwiseRun& run) {
    return Half(index.data(), static_cast<int>(index.shape(0)), run.channels());
}

void bind_pointwise(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<PointwiseLayer>(m, "PointwiseLayer")
        .def(
            "__init__",
            [](PointwiseLayer* self, Matrix weight, Bias bias, bool relu, bool conditioned) {
                const int outputs = static_cast<int>(weight.shape(0)),
                          inputs = static_cast<int>(weight.shape(1));
                new (self) PointwiseLayer{{weight.data(), bias.data(), outputs, inputs}, relu, conditioned};
            },
            "weight"_a.noconvert(), "bias"_a.noconvert(), "relu"_a, "conditioned"_a);
    nb::class_<PointwiseRun>(m, "PointwiseRun")
        .def(nb::init<int>(), "channels"_a)
        .def(
            "product",
            [](PointwiseRun& run, const PointwiseLayer& layer) { run.add(PointwiseProduct{layer.weights}); },
            "layer"_a)
        .def(
            "residual",
            [](PointwiseRun& run, const Layers& layers, const PointwiseLayer& last, float factor) {
                run.add(PointwiseResidual{{{}, layers}, last.weights, factor});
            },
            "layers"_a, "last"_a, "factor"_a)
        .def(
            "additive",
            [](PointwiseRun& run, const Layers& layers, Channels passive, Channels active, float factor) {
                run.add(
                    PointwiseAdditive{{channels_of(passive, run), layers}, channels_of(active, run), factor});
            },
            "layers"_a, "passive"_a.noconvert(), "active"_a.noconvert(), "factor"_a)
        .def(
            "affine",
            [](PointwiseRun& run, const Layers& layers, Channels passive, Channels active, Bias shift,
               float clamp, bool inverse) {
                run.add(PointwiseAffine{{channels_of(passive, run), layers},
                                        channels_of(active, run),
                                        {shift.data(), shift.data() + shift.shape(0)},
                                        clamp,
                                        inverse});
            },
            "layers"_a, "passive"_a.noconvert(), "active"_a.noconvert(), "shift"_a.noconvert(), "clamp"_a,
            "inverse"_a)
        .def(
            "reorder",
            [](PointwiseRun& run, Channels index, Bias scale, Bias bias) {
                const auto n = index.shape(0);
                run.add(PointwiseReorder{{index.data(), index.data() + n},
                                         {scale.data(), scale.data() + n},
                                         {bias.data(), bias.data() + n}});
            },
            "index"_a.noconvert(), "scale"_a.noconvert(), "bias"_a.noconvert())
        .def(
            "run",
            [](const PointwiseRun& run, Matrix rows, State state, std::int64_t positions,
               const std::vector<Shares>& shares, std::optional<LogDet> log_det, int threads) {
                std::vector<Condition> conditions;
                for (const Shares& share : shares)
                    conditions.push_back({share.data(), static_cast<std::int64_t>(share.shape(0)),
                                          static_cast<int>(share.shape(2))});
                nb::gil_scoped_release unlocked;
                run.run(rows.data(), state.data(), static_cast<std::int64_t>(state.shape(0)), positions,
                        conditions, log_det ? log_det->data() : nullptr, threads);
            },
            "rows"_a.noconvert(), "state"_a.noconvert(), "positions"_a, "shares"_a,
            "log_det"_a.noconvert().none(), "threads"_a);
}

#else

void bind_pointwise(nb::module_&) {}

#endif

}  // namespace usf
