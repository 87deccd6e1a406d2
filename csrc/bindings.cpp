#include "bindings.hpp"

NB_MODULE(_core, m) {
    m.doc() = "Component tree and a-contrario test; the public functions are in usf_kernels.segmentation.";
    usf::bind_component_tree(m);
    usf::bind_nfa(m);
    usf::bind_stage_run(m);
    usf::bind_convolutions(m);
    usf::bind_rows(m);
    usf::bind_ops(m);
}
