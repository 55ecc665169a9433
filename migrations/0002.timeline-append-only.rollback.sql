DROP FUNCTION IF EXISTS timeline_json(timeline);

DROP TRIGGER IF EXISTS timeline_append_only ON timeline;

DROP FUNCTION IF EXISTS timeline_is_append_only();
