package tools

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"unicode/utf8"

	"cal/nucleus"
)

// Caps of the file tools.
const (
	MaxImage     = 3932160 // bytes: 5 MiB in base64, what the models take
	maxReadLines = 2000    // lines of one read_files
	maxReadBytes = 256 << 10
	maxReadFile  = 64 << 20 // a larger one is refused: its lines would have to be counted
	maxEditFile  = MaxArgs
	maxDigest    = 1 << 30 // of a file that write_files replaces
)

// ReadResult is what read_files returns: the lines Start to Start+Lines-1 of
// Total, exactly as they stand in the file, or an image. Notice says what was
// left out.
type ReadResult struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Start   int    `json:"start,omitempty"`
	Lines   int    `json:"lines,omitempty"`
	Total   int    `json:"total_lines"`
	Bytes   int64  `json:"bytes"`
	Notice  string `json:"notice,omitempty"`
	Image   *Image `json:"image,omitempty"`
}

// Image is a picture as bytes.
type Image struct {
	MIME string `json:"mime"`
	Data []byte `json:"data_b64"`
}

// WriteResult is what write_files returns.
type WriteResult struct {
	Path    string `json:"path"`
	Bytes   int    `json:"bytes"`
	Created bool   `json:"created"`
	SHA256  string `json:"sha256"`
}

// EditResult is what edit_files returns.
type EditResult struct {
	Path     string `json:"path"`
	Replaced int    `json:"replaced"`
	SHA256   string `json:"sha256"`
}

// plan is a call that has been resolved: what it will do, and the doing, which
// uses exactly the values of the action.
type plan struct {
	action nucleus.Action
	run    func(ctx context.Context, caller *caller) (value any, exit int, err error)
}

func (w *worker) planRead(action nucleus.Action, args ReadArgs) (plan, error) {
	rel, err := w.box.Resolve(args.Path)
	if err != nil {
		return plan{}, err
	}
	action.Files = []nucleus.File{{Path: rel}}
	return plan{action, func(context.Context, *caller) (any, int, error) {
		result, err := w.read(rel, args)
		return result, 0, err
	}}, nil
}

func (w *worker) read(rel string, args ReadArgs) (ReadResult, error) {
	result := ReadResult{Path: rel}
	// Most files are small: one buffer of their size, and no reader's buffers.
	content, whole, err := w.box.ReadSmall(rel, smallFile)
	if err != nil {
		return result, err
	}
	if whole {
		return w.readFrom(result, bufio.NewReaderSize(bytes.NewReader(content), min(len(content), readAhead)), int64(len(content)), args)
	}
	file, size, err := w.box.Open(rel)
	if err != nil {
		return result, err
	}
	defer file.Close()
	return w.readFrom(result, bufio.NewReaderSize(file, readAhead), size, args)
}

const (
	smallFile = 64 << 10
	readAhead = 64 << 10
	headBytes = 8000 // of a file, which tell what it is
)

func (w *worker) readFrom(result ReadResult, reader *bufio.Reader, size int64, args ReadArgs) (ReadResult, error) {
	result.Bytes = size
	head, err := reader.Peek(min(headBytes, reader.Size()))
	if err != nil && err != io.EOF {
		return result, w.box.refusal(result.Path, err)
	}
	if mime := imageType(head); mime != "" {
		result.Image, err = readImage(result.Path, mime, reader, size)
		return result, err
	}
	if bytes.IndexByte(head, 0) >= 0 {
		return result, nucleus.Errorf(nucleus.KindInvalid, "%q is a binary file of %d bytes (%s): look at it with a command", result.Path, size, http.DetectContentType(head))
	}
	if size > maxReadFile {
		return result, nucleus.Errorf(nucleus.KindTooLarge, "%q has %d bytes, at most %d: show a part of it with a command", result.Path, size, maxReadFile)
	}
	return result, readLines(&result, bufio.NewReaderSize(io.LimitReader(reader, maxReadFile), min(reader.Size(), readAhead)), args)
}

func imageType(head []byte) string {
	switch mime := http.DetectContentType(head); mime {
	case "image/png", "image/jpeg", "image/gif", "image/webp":
		return mime
	}
	return ""
}

func readImage(rel, mime string, r io.Reader, size int64) (*Image, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxImage+1))
	if err != nil {
		return nil, nucleus.Errorf(nucleus.KindFailed, "%q: %v", rel, err)
	}
	if len(data) > MaxImage {
		return nil, nucleus.Errorf(nucleus.KindTooLarge, "%q is an image of %d bytes, at most %d", rel, size, MaxImage)
	}
	return &Image{mime, data}, nil
}

// readLines fills in the lines that args asks for and counts all of them. A line
// ends with its line feed.
func readLines(result *ReadResult, reader *bufio.Reader, args ReadArgs) error {
	first, limit := max(args.Offset, 1), args.Limit
	if limit == 0 || limit > maxReadLines {
		limit = maxReadLines
	}
	var content strings.Builder
	for number, open := 1, false; ; {
		piece, err := reader.ReadSlice('\n')
		if err != nil && err != io.EOF && err != bufio.ErrBufferFull {
			return nucleus.Errorf(nucleus.KindFailed, "%q: %v", result.Path, err)
		}
		if len(piece) > 0 && !open {
			result.Total = number
			if number >= first && result.Lines < limit && content.Len() < maxReadBytes {
				result.Lines++
			}
		}
		if shown := result.Lines > 0 && number == first+result.Lines-1; shown {
			content.Write(piece[:min(len(piece), maxReadBytes-content.Len())])
		}
		if err == io.EOF {
			break
		}
		if open = err == bufio.ErrBufferFull; !open {
			number++
		}
	}
	if args.Offset > result.Total && result.Total > 0 {
		return nucleus.Errorf(nucleus.KindInvalid, "offset %d is beyond the end: %q has %d lines", args.Offset, result.Path, result.Total)
	}
	result.Content = content.String()
	if content.Len() >= maxReadBytes {
		result.Content = trimRune(result.Content)
	}
	if !utf8.ValidString(result.Content) {
		return nucleus.Errorf(nucleus.KindInvalid, "%q is not UTF-8 text: convert it with a command, for example iconv", result.Path)
	}
	if result.Lines > 0 {
		result.Start = first
		last := first + result.Lines - 1
		switch {
		case content.Len() >= maxReadBytes:
			result.Notice = fmt.Sprintf("cut after %d bytes, in line %d of %d", len(result.Content), last, result.Total)
		case last < result.Total:
			result.Notice = fmt.Sprintf("lines %d to %d of %d", first, last, result.Total)
		}
	}
	return nil
}

// trimRune takes away a rune that was cut at the end.
func trimRune(s string) string {
	for i := 1; i <= utf8.UTFMax && i <= len(s); i++ {
		if utf8.RuneStart(s[len(s)-i]) {
			if !utf8.FullRuneInString(s[len(s)-i:]) {
				return s[:len(s)-i]
			}
			break
		}
	}
	return s
}

func (w *worker) planWrite(action nucleus.Action, args WriteArgs) (plan, error) {
	rel, err := w.box.Resolve(args.Path)
	if err != nil {
		return plan{}, err
	}
	if err := checkWritable(rel); err != nil {
		return plan{}, err
	}
	before, err := w.box.Digest(rel, maxDigest)
	if err != nil {
		return plan{}, err
	}
	mode, err := args.mode()
	if err != nil {
		return plan{}, err
	}
	content := []byte(args.Content)
	after := nucleus.SHA256(content)
	action.Files = []nucleus.File{{Path: rel, Before: before, After: after}}
	return plan{action, func(context.Context, *caller) (any, int, error) {
		err := w.box.Replace(rel, content, mode)
		return WriteResult{rel, len(content), before == "", after}, 0, err
	}}, nil
}

func (w *worker) planEdit(action nucleus.Action, args EditArgs) (plan, error) {
	rel, err := w.box.Resolve(args.Path)
	if err != nil {
		return plan{}, err
	}
	if err := checkWritable(rel); err != nil {
		return plan{}, err
	}
	before, err := w.readWhole(rel)
	if err != nil {
		return plan{}, err
	}
	count := strings.Count(before, args.Old)
	switch {
	case count == 0:
		return plan{}, nucleus.Errorf(nucleus.KindNotFound, "the text was not found in %q%s", rel, hintForMissing(before, args.Old))
	case count > 1 && !args.All:
		return plan{}, nucleus.Errorf(nucleus.KindInvalid, `the text occurs %d times in %q: give more of what is around it, or set "all"`, count, rel)
	}
	if grown := len(before) + count*(len(args.New)-len(args.Old)); grown > maxEditFile {
		return plan{}, nucleus.Errorf(nucleus.KindTooLarge, "%q would have %d bytes, at most %d", rel, grown, maxEditFile)
	}
	content := []byte(strings.ReplaceAll(before, args.Old, args.New))
	after := nucleus.SHA256(content)
	action.Files = []nucleus.File{{Path: rel, Before: nucleus.SHA256([]byte(before)), After: after}}
	return plan{action, func(context.Context, *caller) (any, int, error) {
		err := w.box.Replace(rel, content, 0)
		return EditResult{rel, count, after}, 0, err
	}}, nil
}

func (w *worker) readWhole(rel string) (string, error) { return w.readUpTo(rel, maxEditFile) }

func (w *worker) readUpTo(rel string, limit int64) (string, error) {
	file, size, err := w.box.Open(rel)
	if err != nil {
		return "", err
	}
	defer file.Close()
	if size > limit {
		return "", nucleus.Errorf(nucleus.KindTooLarge, "%q has %d bytes, at most %d", rel, size, limit)
	}
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return "", w.box.refusal(rel, err)
	}
	if int64(len(content)) > limit {
		return "", errors.Join(nucleus.Errorf(nucleus.KindTooLarge, "%q grows while it is read", rel))
	}
	return string(content), nil
}

// hintForMissing names the two usual reasons why a text that a reader sees is
// not the text that is there.
func hintForMissing(content, old string) string {
	if strings.Contains(strings.ReplaceAll(content, "\r\n", "\n"), strings.ReplaceAll(old, "\r\n", "\n")) {
		return ": it is there with other line ends (CR LF)"
	}
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	if needle := squeeze(old); needle != "" && strings.Contains(squeeze(content), needle) {
		return ": it is there with other spaces or indentation"
	}
	return ""
}
