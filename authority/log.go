package authority

import (
	"archive/tar"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"cal/nucleus"
)

// Who may ask may read the authority's log, which its user alone can read on the disk: whatever it
// says they can ask for anyway, and so they can hold their own log against it.

// logFiles are the files of the log at one moment. Tiles that are full never change, so only their
// names are taken; they may be many.
type logFiles struct {
	loose map[string][]byte // by name
	full  []string
}

// logFiles reads what may change of the log while nothing is appended to it.
func (a *Authority) logFiles() (logFiles, error) {
	files := logFiles{loose: map[string][]byte{}}
	a.mu.Lock()
	defer a.mu.Unlock()
	err := filepath.WalkDir(a.cfg.LogDir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(a.cfg.LogDir, path)
		if err != nil {
			return err
		}
		if strings.HasPrefix(name, "tile/") && !strings.Contains(name, ".p/") {
			files.full = append(files.full, name)
			return nil
		}
		files.loose[name], err = os.ReadFile(path)
		return err
	})
	return files, err
}

// serveLog answers with the log's directory as a tar.
func (a *Authority) serveLog(w http.ResponseWriter, r *http.Request) {
	if _, err := a.allowed(r, asker); err != nil {
		answer(w, nil, err)
		return
	}
	if a.cfg.LogDir == "" {
		answer(w, nil, nucleus.Errorf(nucleus.KindNotFound, "this authority keeps its log in its database alone"))
		return
	}
	files, err := a.logFiles()
	if err != nil {
		answer(w, nil, nucleus.Errorf(nucleus.KindUnavailable, "the authority cannot read its log: %v", err))
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	archive := tar.NewWriter(w)
	for name, raw := range files.loose {
		if err = addFile(archive, name, raw); err != nil {
			panic(http.ErrAbortHandler) // a whole answer is a whole log
		}
	}
	for _, name := range files.full {
		raw, err := os.ReadFile(filepath.Join(a.cfg.LogDir, name))
		if err != nil || addFile(archive, name, raw) != nil {
			panic(http.ErrAbortHandler)
		}
	}
	_ = archive.Close() // a peer that went away asks again
}

func addFile(archive *tar.Writer, name string, raw []byte) error {
	if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(raw))}); err != nil {
		return err
	}
	_, err := archive.Write(raw)
	return err
}
