#pragma once

#include <filesystem>
#include <string>
#include <vector>

/// The texts of a UTF-8 file, as in chameleon_deploy/terminal/texts.py: a .jsonl file has one JSON object with a string
/// "text" per line, any other file has paragraphs, separated by blank lines. Throws chameleon::InputError for a file
/// that is missing, empty, not UTF-8, or not of that form.
std::vector<std::string> read_texts(const std::filesystem::path& path);
