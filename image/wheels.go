package image

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// A cached response is searched for a wheel up to this size.
const largestWheel = 1 << 30

// gatherWheels copies every wheel of a pip cache into house, under the name that
// it must have, and says whether house holds any. What is there already is not
// read again: a marker bears the cache file's name, which is the digest of its URL.
func gatherWheels(ctx context.Context, cache, house string) (found bool, err error) {
	var failed error
	for _, part := range []string{"http-v2", "http", "wheels"} {
		top := filepath.Join(cache, part)
		err := filepath.WalkDir(top, func(name string, entry fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || !entry.Type().IsRegular() || part == "http-v2" && !strings.HasSuffix(name, ".body") {
				return err
			}
			return gatherWheel(name, house)
		})
		failed = errors.Join(failed, err)
	}
	entries, err := os.ReadDir(house)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		failed = errors.Join(failed, err)
	}
	found = slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return strings.HasSuffix(e.Name(), ".whl") })
	return found, failed
}

func gatherWheel(name, house string) error {
	marker := filepath.Join(house, ".seen", filepath.Base(name))
	if _, err := os.Lstat(marker); err == nil {
		return nil
	}
	info, err := os.Stat(name)
	if err != nil || info.Size() > largestWheel {
		return err
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	// The machine's users read it, whatever the umask.
	if err := errors.Join(os.MkdirAll(filepath.Dir(marker), 0o755), os.Chmod(house, 0o755)); err != nil {
		return err
	}
	wheel := cutZip(data)
	if file, err := wheelName(wheel); err == nil {
		unfinished := filepath.Join(house, ".seen", "unfinished")
		if err := errors.Join(os.WriteFile(unfinished, wheel, 0o644), os.Chmod(unfinished, 0o644)); err != nil {
			return err
		}
		if err := os.Rename(unfinished, filepath.Join(house, file)); err != nil {
			return err
		}
	}
	return os.WriteFile(marker, nil, 0o644)
}

// cutZip returns the zip archive in a cached response, whose headers come first
// in pip's older format; nil where there is none.
func cutZip(data []byte) []byte {
	start := bytes.Index(data[:min(len(data), 64<<10)], []byte("PK\x03\x04"))
	end := bytes.LastIndex(data, []byte("PK\x05\x06"))
	const record = 22 // of the end, without its comment
	if start < 0 || end < start || end+record > len(data) {
		return nil
	}
	comment := int(binary.LittleEndian.Uint16(data[end+20:]))
	if end+record+comment > len(data) {
		return nil
	}
	return data[start : end+record+comment]
}

// wheelName makes a wheel's file name from what it says of itself (PEP 427).
func wheelName(wheel []byte) (string, error) {
	archive, err := zip.NewReader(bytes.NewReader(wheel), int64(len(wheel)))
	if err != nil {
		return "", err
	}
	for _, file := range archive.File {
		dir, base := path.Split(file.Name)
		distribution, ok := strings.CutSuffix(strings.TrimSuffix(dir, "/"), ".dist-info")
		if !ok || base != "WHEEL" || strings.Contains(distribution, "/") {
			continue
		}
		content, err := readMember(file)
		if err != nil {
			return "", err
		}
		build, tags := wheelTags(content)
		if name := strings.Join(slices.DeleteFunc([]string{distribution, build, tags}, func(s string) bool { return s == "" }), "-") + ".whl"; tags != "" && safeName(name) {
			return name, nil
		}
	}
	return "", errors.New("not a wheel")
}

func readMember(file *zip.File) (string, error) {
	member, err := file.Open()
	if err != nil {
		return "", err
	}
	defer member.Close()
	content, err := io.ReadAll(io.LimitReader(member, 64<<10))
	return string(content), err
}

// wheelTags joins the Tag lines of a WHEEL file into the compressed set of a
// file name.
func wheelTags(content string) (build, tags string) {
	var parts [3][]string
	for line := range strings.Lines(content) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		switch key {
		case "Build":
			build = value
		case "Tag":
			fields := strings.Split(value, "-")
			if len(fields) != 3 {
				return "", ""
			}
			for i, field := range fields {
				if !slices.Contains(parts[i], field) {
					parts[i] = append(parts[i], field)
				}
			}
		}
	}
	if parts[0] == nil {
		return build, ""
	}
	return build, fmt.Sprintf("%s-%s-%s", strings.Join(parts[0], "."), strings.Join(parts[1], "."), strings.Join(parts[2], "."))
}

func safeName(name string) bool {
	return len(name) < 250 && !strings.HasPrefix(name, ".") && !strings.ContainsFunc(name, func(r rune) bool {
		return r != '.' && r != '_' && r != '-' && r != '+' && r != '!' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	})
}
