DROP FUNCTION timeline_line;

DROP INDEX timeline_kind_id_idx;
