// The settings that both cross entropies save for backward.
#pragma once

#include "ops/autograd/function.h"

namespace dlk {

struct CrossEntropySettings {
  int64_t reduction, ignore_index;
  double label_smoothing;

  void save(AutogradContext* ctx) const {
    ctx->saved_data["reduction"] = reduction;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["label_smoothing"] = label_smoothing;
  }
  static CrossEntropySettings saved_in(AutogradContext* ctx) {
    return {ctx->saved_data["reduction"].toInt(), ctx->saved_data["ignore_index"].toInt(),
            ctx->saved_data["label_smoothing"].toDouble()};
  }
};

}  // namespace dlk
