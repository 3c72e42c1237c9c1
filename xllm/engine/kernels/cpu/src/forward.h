#pragma once

#include "api.h"
#include "pool.h"

namespace xllm {

template <class T>
void forward(Pool& pool, const XllmModel& model, const XllmStep& step);

}  // namespace xllm
