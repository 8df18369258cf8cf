package node

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"

	"cal/internal/durable"
	"cal/internal/idmap"
	"cal/nucleus"
)

// DeleteWorkspace removes a named workspace and all that is in it. What its sessions have
// been exposed to is forgotten with it: that is a person's act, and stands in the log
// before anything is removed.
func (n *Node) DeleteWorkspace(ctx context.Context, actor, name string) error {
	if !workspaceName.MatchString(name) {
		return nucleus.Errorf(nucleus.KindInvalid, "%q is no name of a workspace", name)
	}
	dir := n.dirs.Workspace(name)
	n.awaitRemoval(ctx, dir)
	n.spares.drop(dir)
	gone, err := n.setAside(actor, name, dir)
	if err != nil {
		return err
	}
	return idmap.RemoveAll(ctx, gone)
}

// setAside records the deletion and takes the workspace out of the way of new pods.
func (n *Node) setAside(actor, name, dir string) (gone string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.pods {
		if p.record.Workspace == dir && p.holds() {
			return "", nucleus.Errorf(nucleus.KindConflict, "workspace %q is in use by pod %s (cal vm stop %s)", name, p.record.ID, p.record.ID)
		}
	}
	if info, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return "", nucleus.Errorf(nucleus.KindNotFound, "no workspace %q", name)
	} else if err != nil {
		return "", err
	}
	values := map[string]any{"workspace": name}
	var known exposureFile
	if err := durable.Load(filepath.Join(dir, exposureName), &known); err == nil {
		values["cleared"] = known.Legs
	} else if !errors.Is(err, fs.ErrNotExist) {
		values["error"] = logged(err.Error(), 500)
	}
	if _, err := n.append(nucleus.Entry{Actor: actor, Kind: nucleus.KindSessionClear, Data: data(values)}); err != nil {
		return "", logFailure(err)
	}
	gone = filepath.Join(filepath.Dir(dir), goneWorkspace+nucleus.NewID(""))
	return gone, os.Rename(dir, gone)
}

// goneWorkspace begins the names of workspaces on their way to removal. No workspace has such
// a name.
const goneWorkspace = ".gone-"

// removeGone removes what a node that ended meanwhile has left of deleted workspaces.
func (n *Node) removeGone(ctx context.Context) {
	left, err := filepath.Glob(n.dirs.Workspace(goneWorkspace + "*"))
	for _, dir := range left {
		err = errors.Join(err, idmap.RemoveAll(ctx, dir))
	}
	if err != nil {
		slog.Warn("a deleted workspace is still on the disk", "error", err)
	}
}

func (n *Node) deleteWorkspace(w http.ResponseWriter, r *http.Request, v verified) error {
	if err := n.DeleteWorkspace(r.Context(), v.caller.KeyID, r.PathValue("name")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
