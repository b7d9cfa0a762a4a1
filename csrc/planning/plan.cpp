#include "planning/plan.h"

namespace dlk {

const char* name(Path path) {
  switch (path) {
    case Path::packed: return "packed";
    case Path::few_rows: return "few_rows";
    case Path::few_columns: return "few_columns";
    case Path::aten: return "aten";
    case Path::simt: return "simt";
    case Path::mma: return "mma";
    case Path::hopper: return "hopper";
    case Path::cublas: return "cublas";
    case Path::fused_mlp: return "fused_mlp";
    case Path::elementwise: return "elementwise";
  }
  return "?";
}

const char* name(StepKind kind) {
  switch (kind) {
    case StepKind::forward: return "forward";
    case StepKind::dgrad: return "dgrad";
    case StepKind::wgrad: return "wgrad";
    case StepKind::backward: return "backward";
    case StepKind::activation_pass: return "activation_pass";
    case StepKind::gradient_pass: return "gradient_pass";
  }
  return "?";
}

}  // namespace dlk
