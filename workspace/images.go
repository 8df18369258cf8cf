package workspace

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"cal/image"
	"cal/nucleus"
)

// Images opens the store of what machines are made of.
func (h Home) Images() (*image.Store, error) { return image.Open(filepath.Join(h.Dir, "images")) }

// ParseImage reads an image as a person writes it: as nucleus.ParseImage does, with paths
// taken from the working directory, or the path alone of a directory or a tarball.
func ParseImage(text string) (nucleus.Image, error) {
	kind, path, named := strings.Cut(text, ":")
	switch {
	case named && (kind == nucleus.ImageDirectory || kind == nucleus.ImageTarball):
	case strings.HasPrefix(text, "/") || strings.HasPrefix(text, "."):
		kind, path = "", text
	default:
		return nucleus.ParseImage(text)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nucleus.Image{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nucleus.Image{}, fmt.Errorf("image: %w", err)
	}
	is := nucleus.ImageTarball
	if info.IsDir() {
		is = nucleus.ImageDirectory
	}
	if kind != "" && kind != is {
		return nucleus.Image{}, fmt.Errorf("image: %s is no %s", path, kind)
	}
	i := nucleus.Image{Kind: is, Path: path}
	return i, i.Check()
}
