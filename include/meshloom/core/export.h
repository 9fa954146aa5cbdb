#pragma once

/// Marks what the shared libraries export. Everything else is hidden.
#define MESHLOOM_API __attribute__((visibility("default")))
